"""On the path of dummy services: torch is not there, since none of them computes and a launcher must not care."""

import sys


class _Without:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("dummies run without torch", name=name)


sys.meta_path.insert(0, _Without())

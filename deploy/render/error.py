"""What a rendering says of a TOML that is right in itself."""

from common.errors import ConfigError


class UnrenderableError(ConfigError):
    """A rendering cannot express a key's value; `where` is the key as in "nodes[0].gpus"."""

    def __init__(self, where: str, sentence: str) -> None:
        super().__init__(f"{where} {sentence}")
        self.where, self.sentence = where, sentence

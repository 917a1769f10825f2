"""Programmatic dependent launches: a kernel starts while its predecessor ends, which hides the launch.

A kernel launched with PROGRAMMATIC calls `after_predecessor` before it touches any memory: its programs are in place
when the predecessor has ended. What a kernel wrote is seen by the next one, and by those after it. A kernel that lets
its dependents come only behind that wait spares them theirs for what came before it (stream_hidden_hopper).
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter has no launches
PROGRAMMATIC: dict[str, Any] = {} if _INTERPRETED.value else {"launch_pdl": True}


@triton.jit
def after_predecessor():
    """Let the next kernel's programs come, then wait until all that came before is done and written."""
    if not _INTERPRETED:
        gdc_launch_dependents()
        gdc_wait()

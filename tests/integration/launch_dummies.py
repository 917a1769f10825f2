"""`atoll up` with dummy services: the same launcher and zygote, other modules. A program, not a test."""

import sys

from common.errors import Rejected
from deploy import up_command
from deploy.cli import Parser
from deploy.local.supervisor import Options

parser = Parser()
up_command.configure(parser)
arguments = parser.parse_args()
try:
    options = Options(ready_file=arguments.ready_file, package="dummies", verbose=arguments.verbose)
    raise SystemExit(up_command.launch(arguments, options))
except Rejected as exc:
    print(f"atoll: {exc}", file=sys.stderr)
    raise SystemExit(2) from None

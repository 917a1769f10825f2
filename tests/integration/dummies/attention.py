"""A dummy attention."""

from common.ids import Role
from dummies.service import run

run(Role.ATTENTION)

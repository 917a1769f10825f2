"""A dummy router."""

from common.ids import Role
from dummies.service import run

run(Role.ROUTER)

"""A dummy expert."""

from common.ids import Role
from dummies.service import run

run(Role.EXPERT)

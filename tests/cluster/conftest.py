from tests.faults.conftest import steps

__all__ = ["steps"]

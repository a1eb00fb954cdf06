"""Every test of this room runs under strict promotion."""

from tests.helpers.strict import strict_promotion

__all__ = ["strict_promotion"]

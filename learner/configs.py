"""The base of every config class: frozen, keyword-only, and strict about unknown keys."""

from pydantic import BaseModel, ConfigDict


class StrictConfig(BaseModel):
    """A frozen section of the configuration; an unknown key or a value outside its range is an error naming the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

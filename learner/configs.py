"""The base of every config class: frozen, keyword-only, and strict about unknown keys."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

AbsolutePath = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
"""A path that means the same file in any working directory."""


class StrictConfig(BaseModel):
    """A frozen section of the configuration; an unknown key or a value outside its range is an error naming the key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

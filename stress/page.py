"""What our report pages share: where templates lie, how they show figures, and the style (`page.css`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from stress.report import duration, figure, fixed, number, pairs


def page(template: Path, *filters: Callable[..., Any], plots: dict[str, str], **values: Any) -> str:
    """The page by `template`: HTML with its style and its plots inside, without scripts.

    Texts are escaped; `plots` are SVG made by matplotlib here, which escapes every text in it.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters |= {each.__name__: each for each in (duration, figure, fixed, pairs, *filters)}
    environment.filters["clock"] = lambda at: time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
    environment.tests["figure"] = number
    drawn = {name: Markup(svg) for name, svg in plots.items()}
    return environment.get_template(template.name).render(plots=drawn, **values)

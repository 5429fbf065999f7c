"""The README as a package index shows it: there, relative links and images lead nowhere. Everything else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

RELATIVE = r"\((?!https?:|#)[^)\s]*\)"
page = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
page = re.sub(rf"!\[[^\]]*\]{RELATIVE}\n*", "", page)
page = re.sub(rf"\[([^\]]*)\]{RELATIVE}", r"\1", page)

setup(long_description=page, long_description_content_type="text/markdown")

"""Files of the repository that the site shows, though they are not in docs/.

A link from a page to one of them is written as it works in a checkout, ../examples/cifar.py say;
on the site docs/ is the top, so that one `../` goes.
"""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
SHOWN = (
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "benchmarks/*.md", "benchmarks/*.png",
    "examples/*.py", "examples/results/*.png", "examples/notebooks/*.ipynb",
)  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.generated_by:  # from outside of docs/
        return markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../", f"]({up}")

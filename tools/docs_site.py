"""mkdocs hooks of `make docs`: pages and links made at build time, and a check of the public names.

The build fails if a public name is missing on docs/api.md or has no docstring.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# The public names: `__all__` of these modules, every public function of export, and what is listed.
DOORS = ("ewavit", "ewavit.core", "ewavit.distributed")
EXPORT = "ewavit.training.export"
LISTED = {
    "ewavit.errors": ("Diverged", "Refused"),
    "ewavit.data.options": ("DataOptions",),
    "ewavit.training.recipe": ("Recipe",),
    "ewavit.training.hub": ("publish",),
    "ewavit.training.loop": ("Result", "TrainingRun", "resume", "train"),
    "ewavit.training.inference": ("Outputs", "predict"),
    "ewavit.compare.arms": ("Arm", "make_arms"),
    "ewavit.compare.compare": ("compare",),
}
# Files outside of docs/ that pages link to, as ../records/NAME: they are part of the site.
LINKED = (
    "records/*.json", "recipes/**/*.yaml", "examples/*", "tests/test_*.py", "CONTRIBUTING.md", "SECURITY.md"
)  # fmt: skip


def command_line_page() -> str:
    """The page that tools/command_line_page.py prints."""
    spec = importlib.util.spec_from_file_location("command_line_page", ROOT / "tools/command_line_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.page())


def public_names() -> Iterator[tuple[str, Any]]:
    """Every public name with its module, and the object."""
    for door in DOORS:
        module = importlib.import_module(door)
        yield from ((f"{door}.{name}", getattr(module, name)) for name in module.__all__)
    functions = inspect.getmembers(importlib.import_module(EXPORT), inspect.isfunction)
    exported = [name for name, value in functions if value.__module__ == EXPORT and name[0] != "_"]
    for name, members in {**LISTED, EXPORT: exported}.items():
        module = importlib.import_module(name)
        yield from ((f"{name}.{member}", getattr(module, member)) for member in members)


def undocumented(page: str) -> list[str]:
    """What docs/api.md or the docstrings lack, one sentence each.

    Args:
        page: text of docs/api.md.
    """
    shown = set(re.findall(r"^::: (\S+)", page, re.MULTILINE))
    found = []
    for name, value in public_names():
        if name not in shown:
            found.append(f"{name} is not on docs/api.md")
        if not _has_docstring(value):
            found.append(f"{name} has no docstring")
        if inspect.isclass(value) and value.__module__.startswith("ewavit"):
            members = [member for member in vars(value) if not member.startswith("_")]
            found += [
                f"{name}.{member} has no docstring"
                for member in members
                if _is_code(vars(value)[member]) and not _has_docstring(getattr(value, member))
            ]
    return found


def _is_code(member: Any) -> bool:
    return inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod))


def _has_docstring(value: Any) -> bool:
    text = inspect.getdoc(value) or ""
    generated = inspect.isclass(value) and text.startswith(f"{value.__name__}(")  # a dataclass's own
    return bool(text) and not generated


def on_pre_build(config: MkDocsConfig) -> None:
    """Check the public names."""
    from mkdocs.exceptions import PluginError

    if problems := undocumented((Path(config.docs_dir) / "api.md").read_text()):
        raise PluginError("\n".join(problems))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated page, the changelog, and the files that pages link to."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "command-line.md", content=command_line_page()))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    for pattern in LINKED:
        for path in sorted(filter(Path.is_file, ROOT.glob(pattern))):
            name = path.relative_to(ROOT).as_posix().replace(".md", ".md.txt")
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def with_tabs(markdown: str) -> str:
    """Make a tab of each section between the two marks, and show a script where its link stands alone.

    The page in the repository has headings and links instead, which every reader of Markdown shows.
    """
    before, start, rest = markdown.partition("<!-- tabs -->\n")
    if not start:
        return markdown
    tabs, _, after = rest.partition("<!-- end of tabs -->\n")
    tabs = re.sub(
        r"^\[.+\]\(\.\./(examples/.+\.py)\)$",
        lambda link: f"{link[0]}\n\n```python\n{(ROOT / link[1]).read_text()}```",
        tabs,
        flags=re.MULTILINE,
    )
    tabs = re.sub(r"^(?=.)", "    ", tabs, flags=re.MULTILINE)
    return before + re.sub(r"^    ## (.+)$", r'=== "\1"', tabs, flags=re.MULTILINE) + after


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make tabs, and point links to the repository's files at their copies in the site."""
    markdown = with_tabs(markdown)
    markdown = re.sub(r"\]\(\.\./((?:records|recipes|examples|tests)/[^)#]+)\)", r"](\1)", markdown)
    return re.sub(r"\]\(\.\./(CONTRIBUTING|SECURITY)\.md\)", r"](\1.md.txt)", markdown)

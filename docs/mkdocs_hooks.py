"""Files of the documentation's site, where they stand in the repository, so that their links hold on both."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "docs/*.md"),
    "bench/results/accuracy/*/README.md",
)
API = "api"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as on GitHub."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages, what they link to beside them, and a page of each wing made of its docstrings."""
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {path for page in pages for path in links(page) if path.is_file() and path not in pages}
    found = [
        File(path.relative_to(ROOT).as_posix(), str(ROOT), config.site_dir, config.use_directory_urls)
        for path in (*pages, *sorted(linked))
    ]
    made = [File.generated(config, f"{API}/{wing}.md", content=page(wing)) for wing in wings()]
    return Files([*theme, *found, *made])


def links(page: Path) -> set[Path]:
    """Files that a page links to, wherever they are in the repository."""
    targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in targets}


def wings() -> list[str]:
    """Names of the packages in engine/; engine itself stands first."""
    return ["engine", *sorted(path.parent.name for path in (ROOT / "engine").glob("*/__init__.py"))]


def page(wing: str) -> str:
    """Markdown of a wing: a heading, and each of its modules."""
    title = "engine" if wing == "engine" else f"engine.{wing}"
    folder = (ROOT / title.replace(".", "/")).resolve()  # rglob follows no link
    paths = folder.glob("*.py") if wing == "engine" else folder.rglob("*.py")
    inside = sorted(path.relative_to(folder).with_suffix("").parts for path in paths)
    names = [".".join((title, *parts)).removesuffix(".__init__") for parts in inside if parts[-1] != "__main__"]
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])

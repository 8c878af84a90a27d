"""Makes a static site of the documents, in build/site/: `make site`.

Sphinx gets a copy of them in which each lies where it lies in the tree, so that the links between them
hold. The manual pages become Markdown by perl's pod2markdown, the examples pages with their source.
It warns of a link that leads nowhere, and a warning is an error. Nothing is fetched from anywhere,
neither when the site is built nor when it is read.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE, SITE = ROOT / "build" / "site-source", ROOT / "build" / "site"
MANUAL = {"qcow2snap": "qcow2snap(1)", "nbdkit-qcow2snap-plugin": "nbdkit-qcow2snap-plugin(1)"}
# What stands at the side, under which heading.  Pages of docs/ that are not named are under the first.
CONTENTS = {
    "Using it": ["docs/install", "docs/recipes", "docs/library", "examples/index"],
    "Manual pages": [f"man/{page}" for page in MANUAL],
    "How it works": ["docs/live", "docs/security", "docs/performance", "docs/validation"],
    "The project": [
        *("CHANGELOG", "CONTRIBUTING", "To report a security problem <SECURITY>", "RELEASING"),
        *("docs/upstream-qemu", "docs/upstream-nbdkit"),
    ],
}


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"site: {command[0]} ended with status {done.returncode}")
    return done.stdout


def moved(text: str) -> str:
    """The links to what lies elsewhere in the site."""
    text = re.sub(r"\]\(((?:\.\./)*)README\.md", r"](\1index.md", text)
    text = re.sub(r"\]\(docs/([\w-]+)\.pod\)", r"](man/\1.md)", text)
    return re.sub(r"\]\(((?:\.\./)*)examples/\)", r"](\1examples/index.md)", text)


def contents() -> str:
    named = {page for pages in CONTENTS.values() for page in pages}
    there = sorted(f"docs/{page.stem}" for page in ROOT.glob("docs/*.md"))
    CONTENTS["Using it"] += [page for page in there if page not in named]
    blocks = []
    for heading, pages in CONTENTS.items():
        lines = "\n".join(pages)
        blocks.append(f"```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{lines}\n```\n")
    return "\n".join(blocks)


def manual(page: str) -> str:
    """A manual page. Pages of other projects are linked to in Debian's collection."""
    text = run("pod2markdown", "--utf8", ROOT / "docs" / f"{page}.pod")
    text = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
    text = re.sub(r"http://man\.he\.net/man(\d)/([\w.-]+)", target, text)
    return f"# {MANUAL[page]}\n\n{text}"


def target(link: re.Match[str]) -> str:
    section, page = link.groups()
    return f"{page}.md" if page in MANUAL else f"https://manpages.debian.org/{page}.{section}"


def example(file: Path) -> str:
    return f"## {file.name}\n\n```python\n{file.read_text()}```\n"


def write() -> None:
    shutil.rmtree(SOURCE, ignore_errors=True)
    for folder in ("docs", "man", "examples"):
        (SOURCE / folder).mkdir(parents=True)
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        text = moved(page.read_text())
        if page == ROOT / "README.md":
            (SOURCE / "index.md").write_text(f"{text}\n{contents()}")
        else:
            (SOURCE / page.relative_to(ROOT)).write_text(text)
    for picture in ROOT.glob("docs/*.svg"):
        shutil.copy(picture, SOURCE / "docs")
    shutil.copy(ROOT / "LICENSE", SOURCE)
    for page in MANUAL:
        (SOURCE / "man" / f"{page}.md").write_text(manual(page))
    programs = sorted(ROOT.glob("examples/*.py"))
    text = "# Programs that use the library\n\n" + "\n".join(map(example, programs))
    (SOURCE / "examples" / "index.md").write_text(text)
    for program in programs:
        shutil.copy(program, SOURCE / "examples")


write()
shutil.rmtree(SITE, ignore_errors=True)
strictly = ("-q", "-W", "--keep-going")
cache = ("-d", ROOT / "build" / "site-doctrees", "-E")
run("sphinx-build", *strictly, *cache, "-c", Path(__file__).parent, SOURCE, SITE)
print(SITE / "index.html")

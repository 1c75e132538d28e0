"""Every example of the documentation runs: `pytest README.md`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent
SHOWN_ELSEWHERE = {"git", "cd", "pip"}  # a fresh clone is CI's; tests/test_install.py has pip


def run_shell(example: Example) -> None:
    for line in example.parsed.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        if "reference.pretrain" in command:  # behind python or torchrun, and their options
            check_training_options(command[command.index("reference.pretrain") + 1 :])
        elif command[:1] == ["make"]:
            call(shlex.join(["make", "--dry-run", *command[1:]]))
        elif command and command[0] not in SHOWN_ELSEWHERE:
            call(line)


def check_training_options(arguments: list[str]) -> None:
    from reference.pretrain import parse_config

    parse_config(arguments)


def call(line: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="bash", evaluator=run_shell),
        SkipParser(),
    ],
    patterns=["README.md", "CONTRIBUTING.md", "docs/*.md", "docs/integrations/*.md"],
).pytest()

"""What a command prints is shown, not sent, and can be printed in any encoding."""

from __future__ import annotations

import subprocess
import sys

import pytest
from rich.table import Table

from pretrain.core.machine.terminal import console, safe_output

HOSTILE = "\x1b[31mred\x07\u202e\udce9"
SHOWN = r"\x1b[31mred\x07\u202e\udce9"


def test_what_is_printed_is_shown_and_line_breaks_stay(capsys):
    @safe_output()
    def main() -> None:
        print(HOSTILE, "two", sep="\n")
        print(HOSTILE, file=sys.stderr)
        with safe_output():  # a command within a command: escaped once
            print("\x1b")

    before = sys.stdout, sys.stderr
    main()
    assert (sys.stdout, sys.stderr) == before
    said = capsys.readouterr()
    assert said.out == f"{SHOWN}\ntwo\n\\x1b\n" and said.err == f"{SHOWN}\n"


def test_streams_are_restored_when_a_command_exits(capsys):
    before = sys.stdout
    with pytest.raises(SystemExit), safe_output():
        print("\x1b")
        sys.exit(2)
    assert sys.stdout is before and capsys.readouterr().out == "\\x1b\n"


def test_a_table_of_rich_takes_text_without_markup(capsys):
    with safe_output():
        table = Table("[bold]name[/bold]")
        table.add_row("[red]x[/red]")
        console().print(table)
    assert "[red]x[/red]" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_a_traceback_and_any_name_can_be_printed_in_any_encoding(encoding: str):
    code = (
        "from pretrain.core.machine.terminal import safe_output\n"
        "@safe_output()\n"
        "def main():\n"
        "    print('\\x1b \\udce9 \\u65e5')\n"
        "    raise ValueError('\\x1b[31m \\udce9 \\u65e5')\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)},
    )
    assert b"\x1b" not in done.stdout + done.stderr
    assert done.stdout.startswith(b"\\x1b \\udce9 "), done.stderr
    assert b"ValueError: \\x1b[31m \\udce9 " in done.stderr

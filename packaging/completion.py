"""Writes bash's completion of the command qcow2snap, from the command's own parser.

/usr/bin/python3 packaging/completion.py >/usr/share/bash-completion/completions/qcow2snap
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qcow2snap_core.cli import _parser

SCRIPT = """\
# bash completion of qcow2snap, written from its parser
_qcow2snap()
{
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= options= i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} != -* ]]; then
            command=${COMP_WORDS[i]}
            break
        fi
    done
    case $command,$prev in
@values@
    esac
    case $command in
@options@
    esac
    if [[ $cur == -* || -z $command ]]; then
        COMPREPLY=($(compgen -W "$options" -- "$cur"))
    fi
} && complete -o default -F _qcow2snap qcow2snap
"""


def options_of(parser):
    """What starts with a dash, but for what help does not show."""
    return [
        option
        for action in parser._actions
        if action.help is not argparse.SUPPRESS
        for option in action.option_strings
    ]


def choices_case(command, action):
    """What follows an option that takes one of some words; bash completes file names itself."""
    where = "|".join(f"{command},{option}" for option in action.option_strings)
    words = " ".join(action.choices)
    return f'    {where}) COMPREPLY=($(compgen -W "{words}" -- "$cur")); return ;;'


def script(parser):
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    words = " ".join([*commands.choices, *options_of(parser)])
    options = [f'    "") options="{words}" ;;']
    values = []
    for name, command in commands.choices.items():
        options.append(f'    {name}) options="{" ".join(options_of(command))}" ;;')
        values += [
            choices_case(name, action)
            for action in command._actions
            if action.option_strings and action.choices
        ]
    return SCRIPT.replace("@values@", "\n".join(values)).replace("@options@", "\n".join(options))


print(script(_parser()), end="")

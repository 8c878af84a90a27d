"""Writes a shell's completion of the command qcow2snap, from the command's own parser.

    /usr/bin/python3 packaging/completion.py bash|zsh|fish

What a word is completed with goes by its metavar: FILE by files, SNAPSHOT by the image's snapshots,
which `qcow2snap list --names` prints.  Images are hostile: no name is ever evaluated by the shell,
and an image that is no local file or block device is not asked.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qcow2snap_core.cli import whole_parser

KINDS = {
    **dict.fromkeys(("FILE", "TOP", "OUT", "TARGET", "PATH", "SOCKET", "MAP"), "files"),
    **dict.fromkeys(("DIR", "OUTDIR", "REPOSITORY"), "directories"),
    **dict.fromkeys(("SNAPSHOT", "SNAPSHOT[:PARTITION]", "OLD", "NEW"), "snapshots"),
    "SNAPSHOT,...": "several",
    "COMMAND": "commands",
}


class Option(NamedTuple):
    names: list[str]
    help: str
    metavar: str  # empty if it takes no value
    kind: str  # of the value: one of KINDS, or words to choose from


class Command(NamedTuple):
    name: str
    help: str
    options: list[Option]
    arguments: list[tuple[str, str]]  # (metavar, kind), in order


def kind_of(action, metavar):
    return " ".join(action.choices) if action.choices else KINDS.get(metavar, "")


def options_of(parser):
    """What starts with a dash, but for what help does not show."""
    for action in parser._actions:
        if action.option_strings and action.help is not argparse.SUPPRESS:
            takes = action.nargs != 0
            metavar = (action.metavar or action.dest.upper()) if takes else ""
            yield Option(action.option_strings, action.help, metavar, kind_of(action, metavar))


def arguments_of(parser):
    actions = [action for action in parser._actions if not action.option_strings]
    for action in actions:
        for word in str(action.metavar).replace("[", "").replace("]", "").split():
            if word.isupper():
                # Where a snapshot may be left out there may be the directory that comes behind it.
                left_out = action.nargs == "?" and action is not actions[-1]
                yield word, "either" if left_out else kind_of(action, word)


def commands_of(parser):
    [commands] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for choice in commands._choices_actions:
        command = commands.choices[choice.dest]
        yield Command(choice.dest, choice.help, [*options_of(command)], [*arguments_of(command)])


def names(options):
    return " ".join(name for option in options for name in option.names)


# --- bash ---

BASH = r"""# bash completion of qcow2snap, written from its parser
_qcow2snap_snapshots()
{
    local name before=
    [[ $1 == several ]] && before=${cur%"${cur##*,}"}
    [[ -f $file || -b $file ]] || return
    while IFS= read -r name; do
        printf -v name %q "$name"
        [[ $before$name == "$cur"* ]] && COMPREPLY+=("$before$name")
    done < <("$program" list --names -- "$file" 2>/dev/null </dev/null)
}

_qcow2snap()
{
    local words=() program command= options= takes= option= dashes= file= position=0 kind= i
    COMPREPLY=()
    # What bash has cut at = and : belongs together.
    for ((i = 0; i <= COMP_CWORD; i++)); do
        if ((i > 1)) && [[ ${COMP_WORDS[i]} == [:=]* || ${COMP_WORDS[i-1]} == *[:=] ]]; then
            words[-1]+=${COMP_WORDS[i]}
        else
            words+=("${COMP_WORDS[i]}")
        fi
    done
    local cur=${words[-1]} last=$((${#words[@]} - 1)) end=${COMP_WORDS[COMP_CWORD]}
    program=${words[0]/#\~\//$HOME/}
    ((last > 1)) && command=${words[1]}
    case $command in
@options@
    esac
    for ((i = 2; i < last; i++)); do
        if [[ -n $option ]]; then
            option=
        elif [[ -z $dashes && ${words[i]} == -- ]]; then
            dashes=1
        elif [[ -z $dashes && ${words[i]} == -* ]]; then
            [[ " $takes " == *" ${words[i]} "* ]] && option=${words[i]}
        elif ((position++ == 0)); then
            file=${words[i]//[\"\'\\]/}
            file=${file/#\~\//$HOME/}
        fi
    done
    if [[ -z $option && -z $dashes && $cur == --*=* ]]; then
        option=${cur%%=*} cur=${cur#*=}
    fi
    if [[ -z $option && -z $dashes && $cur == -* ]]; then
        kind=$options
    else
        case $command,${option:-$position} in
@kinds@
        esac
    fi
    case $kind in
        files) ;;
        directories) compopt -o dirnames +o default 2>/dev/null ;;
        snapshots | several | either)
            compopt +o default 2>/dev/null
            _qcow2snap_snapshots "$kind"
            # Where no snapshot begins so, a directory may.
            [[ $kind == either ]] && compopt -o dirnames 2>/dev/null
            ;;
        *)
            [[ -n $kind ]] && compopt +o default 2>/dev/null
            COMPREPLY=($(compgen -W "$kind" -- "$cur"))
            ;;
    esac
    # It only replaces what stands behind the last = or :.
    [[ $end == [:=] ]] && end=
    local before=${cur%"$end"}
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
} && complete -o default -F _qcow2snap qcow2snap
"""


def bash(parser, commands):
    words = " ".join(command.name for command in commands)
    options = [f'        "") options="{words} {names(options_of(parser))}" ;;']
    kinds = [f'            ,0) kind="{words}" ;;']
    for command in commands:
        takes = names(o for o in command.options if o.metavar)
        options.append(
            f'        {command.name}) options="{names(command.options)}" takes="{takes}" ;;'
        )
        places = [
            *((o.names, o.kind) for o in command.options if o.metavar),
            *(([str(n)], kind) for n, (_, kind) in enumerate(command.arguments)),
        ]
        for where, kind in places:
            if kind:
                pattern = "|".join(f"{command.name},{name}" for name in where)
                value = words if kind == "commands" else kind
                kinds.append(f'            {pattern}) kind="{value}" ;;')
    return BASH.replace("@options@", "\n".join(options)).replace("@kinds@", "\n".join(kinds))


# --- zsh ---

ZSH = r"""#compdef qcow2snap
# zsh completion of qcow2snap, written from its parser
_qcow2snap_snapshots() {
    local file=${(Q)line[1]} names
    file=${file/#\~\//$HOME/}
    [[ -f $file || -b $file ]] || return 1
    names=("${(@f)$(qcow2snap list --names -- $file 2>/dev/null </dev/null)}")
    compadd "$@" -a names
}

_qcow2snap_several() {
    compset -P '*,'
    _qcow2snap_snapshots "$@"
}

_qcow2snap() {
    local curcontext=$curcontext state line
    local -a commands
    typeset -A opt_args
    commands=(
@commands@
    )
    _arguments -C @options@ '1:COMMAND:->command' '*:: :->arguments' && return
    if [[ $state == command ]]; then
        _describe command commands
        return
    fi
    case $words[1] in
@cases@
    esac
}

_qcow2snap "$@"
"""


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def zsh_spec(metavar, kind):
    """``:MESSAGE:ACTION`` for what completes a value."""
    action = {
        "": " ",
        "files": "_files",
        "directories": "_files -/",
        "snapshots": "_qcow2snap_snapshots",
        "several": "_qcow2snap_several",
        "either": "{_qcow2snap_snapshots; _files -/}",
        "commands": "{_describe command commands}",
    }.get(kind, f"({kind})")
    return f":{metavar.replace(':', '')}:{action}"


def zsh_options(options):
    for option in options:
        said = "".join("\\" + c if c in "[]:\\" else c for c in option.help.replace("%%", "%"))
        for name in option.names:
            equals = "=" if option.metavar and name.startswith("--") else ""
            value = zsh_spec(option.metavar, option.kind) if option.metavar else ""
            yield quoted(f"*{name}{equals}[{said}]{value}")


def zsh(parser, commands):
    listed = [f"        {quoted(f'{c.name}:{c.help}')}" for c in commands]
    cases = []
    for command in commands:
        places = [
            quoted(f"{number}{zsh_spec(metavar, kind)}")
            for number, (metavar, kind) in enumerate(command.arguments, 1)
            if kind  # without, zsh would say something instead of completing options
        ]
        specs = " \\\n            ".join([*zsh_options(command.options), *places])
        cases.append(f"        {command.name}) _arguments \\\n            {specs} ;;")
    return (
        ZSH.replace("@commands@", "\n".join(listed))
        .replace("@options@", " ".join(zsh_options(options_of(parser))))
        .replace("@cases@", "\n".join(cases))
    )


# --- fish ---

FISH = r"""# fish completion of qcow2snap, written from its parser
function __qcow2snap_arguments
    set -l takes @takes@
    set -l value no
    set -l dashes no
    for word in (commandline -opc)[3..-1]
        if test $value = yes
            set value no
        else if test $dashes = no -a "$word" = --
            set dashes yes
        else if test $dashes = no; and string match -q -- '-*' $word
            contains -- $word $takes; and set value yes
        else
            echo -- $word
        end
    end
end

function __qcow2snap_is
    set -l words (commandline -opc)
    test "$words[2]" = $argv[1]
end

function __qcow2snap_at
    __qcow2snap_is $argv[1]; and test (count (__qcow2snap_arguments)) = $argv[2]
end

function __qcow2snap_snapshots
    set -l arguments (__qcow2snap_arguments)
    set -l file (string replace -r -- '^~/' "$HOME/" $arguments[1])
    test -f "$file" -o -b "$file"; and qcow2snap list --names -- $file 2>/dev/null </dev/null
end

complete -c qcow2snap -f
"""


def fish_kind(kind):
    """The options of ``complete`` for what completes a value."""
    return {
        "": "-x",
        "files": "-r -F",
        "directories": "-x -a '(__fish_complete_directories)'",
        "snapshots": "-x -a '(__qcow2snap_snapshots)'",
        "several": "-x -a '(__qcow2snap_snapshots)'",
        "either": "-x -a '(__qcow2snap_snapshots) (__fish_complete_directories)'",
    }.get(kind, f"-x -a '{kind}'")


def fish_options(condition, options):
    for option in options:
        flags = " ".join(f"-l {n[2:]}" if n[:2] == "--" else f"-s {n[1:]}" for n in option.names)
        value = f" {fish_kind(option.kind)}" if option.metavar else ""
        said = quoted(option.help.replace("%%", "%"))
        yield f"complete -c qcow2snap -n '{condition}' {flags} -d {said}{value}"


def fish(parser, commands):
    lines = [*fish_options("__fish_use_subcommand", options_of(parser))]
    words = " ".join(command.name for command in commands)
    takes = [names(o for o in command.options if o.metavar) for command in commands]
    for command in commands:
        described = f"-a {command.name} -d {quoted(command.help)}"
        lines.append(f"complete -c qcow2snap -n __fish_use_subcommand {described}")
        lines += fish_options(f"__qcow2snap_is {command.name}", command.options)
        for number, (_, kind) in enumerate(command.arguments):
            if kind:
                value = fish_kind(words if kind == "commands" else kind)
                value = value.removeprefix("-x ").removeprefix("-r ")
                lines.append(
                    f"complete -c qcow2snap -n '__qcow2snap_at {command.name} {number}' {value}"
                )
    every = " ".join(sorted({name for some in takes for name in some.split()}))
    return FISH.replace("@takes@", every) + "\n".join(lines) + "\n"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}

if __name__ == "__main__":
    if sys.argv[1:] not in [[shell] for shell in SHELLS]:
        sys.exit("usage: packaging/completion.py bash|zsh|fish")
    whole = whole_parser()
    print(SHELLS[sys.argv[1]](whole, list(commands_of(whole))), end="")

from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from .. import atomic
from ..errors import OutputError
from .output import print_path, say

PROGRAM = "mlx-zimage"
FILES = {  # where each shell, or its completion package, looks for user completions
    "bash": ".local/share/bash-completion/completions/mlx-zimage",
    "zsh": ".zfunc/_mlx-zimage",
    "fish": ".config/fish/completions/mlx-zimage.fish",
}
# Click's own script offers no files if there are other completions, so it would offer only names for a model.
BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' type value
    COMPREPLY=()
    while IFS=',' read -r type value; do
        case $type in
            plain) COMPREPLY+=("$value") ;;
            dir) compopt -o filenames -o plusdirs ;;
            file) compopt -o filenames; COMPREPLY+=($(compgen -f -- "${COMP_WORDS[COMP_CWORD]}")) ;;
        esac
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete "$1")
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""
ZSH = "Make sure ~/.zshrc contains `fpath+=~/.zfunc` before compinit."


@click.command(epilog="Example: mlx-zimage completion zsh --install")
@click.argument("shell", type=click.Choice(list(FILES)))
@click.option("--install", is_flag=True, help="Write the script where that shell looks for it, and print that path.")
@click.pass_context
def completion(ctx: click.Context, shell: str, install: bool) -> None:
    """Print or install the completion script for bash, zsh or fish.

    To set it up without --install, add `eval "$(mlx-zimage completion bash)"` to ~/.bashrc.
    For zsh, replace bash with zsh in that line and add it to ~/.zshrc, after compinit. For fish, run:

    \b
    mlx-zimage completion fish > ~/.config/fish/completions/mlx-zimage.fish
    """
    complete = get_completion_class(shell)
    assert complete, shell  # click supports every shell in FILES
    script = complete(ctx.find_root().command, {}, PROGRAM, "_MLX_ZIMAGE_COMPLETE")
    text = (BASH if shell == "bash" else script.source_template) % script.source_vars()
    if not install:
        click.echo(text)
        return
    file = Path.home() / FILES[shell]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(file, lambda aside: aside.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OutputError(f"could not write {file}: {error.strerror}") from error
    print_path(file)
    if shell == "zsh":
        say(ZSH)

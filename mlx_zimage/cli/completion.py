from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from ..errors import OutputError
from .output import print_path, say

PROGRAM = "mlx-zimage"
FILES = {  # where each shell, or its completion package, looks for a user's completions
    "bash": ".local/share/bash-completion/completions/mlx-zimage",
    "zsh": ".zfunc/_mlx-zimage",
    "fish": ".config/fish/completions/mlx-zimage.fish",
}
ZSH = "If it is not there yet, put `fpath+=~/.zfunc` before compinit in ~/.zshrc."


@click.command(epilog="Example: mlx-zimage completion zsh --install")
@click.argument("shell", type=click.Choice(list(FILES)))
@click.option("--install", is_flag=True, help="Write it where SHELL finds it, and print that file's name.")
@click.pass_context
def completion(ctx: click.Context, shell: str, install: bool) -> None:
    """Print the script that lets SHELL complete this program's commands and options, or install it.

    Without --install: add `eval "$(mlx-zimage completion bash)"` to ~/.bashrc, or the same with zsh to ~/.zshrc, after
    compinit; fish: mlx-zimage completion fish > ~/.config/fish/completions/mlx-zimage.fish
    """
    complete = get_completion_class(shell)
    assert complete, shell  # FILES has none that click does not know
    script = complete(ctx.find_root().command, {}, PROGRAM, "_MLX_ZIMAGE_COMPLETE")
    text = script.source_template % script.source_vars()
    if not install:
        click.echo(text)
        return
    file = Path.home() / FILES[shell]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file} could not be written: {error.strerror}") from error
    print_path(file)
    if shell == "zsh":
        say(ZSH)

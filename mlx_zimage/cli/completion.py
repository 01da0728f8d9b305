from __future__ import annotations

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from ..errors import OutputError
from .output import print_path, say

PROGRAM = "mlx-zimage"
FILES = {  # where each shell, or its completion package, looks for user completions
    "bash": ".local/share/bash-completion/completions/mlx-zimage",
    "zsh": ".zfunc/_mlx-zimage",
    "fish": ".config/fish/completions/mlx-zimage.fish",
}
ZSH = "Make sure ~/.zshrc contains `fpath+=~/.zfunc` before compinit."


@click.command(epilog="Example: mlx-zimage completion zsh --install")
@click.argument("shell", type=click.Choice(list(FILES)))
@click.option("--install", is_flag=True, help="Write the script where SHELL looks for it, and print that path.")
@click.pass_context
def completion(ctx: click.Context, shell: str, install: bool) -> None:
    """Print or install the completion script for SHELL.

    To set it up without --install, add `eval "$(mlx-zimage completion bash)"` to ~/.bashrc, or the same line with zsh
    to ~/.zshrc after compinit; for fish: mlx-zimage completion fish > ~/.config/fish/completions/mlx-zimage.fish
    """
    complete = get_completion_class(shell)
    assert complete, shell  # click supports every shell in FILES
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
        raise OutputError(f"could not write {file}: {error.strerror}") from error
    print_path(file)
    if shell == "zsh":
        say(ZSH)

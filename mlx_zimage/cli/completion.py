from __future__ import annotations

import click
from click.shell_completion import get_completion_class

PROGRAM = "mlx-zimage"


@click.command(epilog="Example: mlx-zimage completion zsh > ~/.zfunc/_mlx-zimage")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx, shell):
    """Print the script that lets SHELL complete this program's commands and options.

    bash: add `eval "$(mlx-zimage completion bash)"` to ~/.bashrc; zsh: the same with zsh in ~/.zshrc, after compinit;
    fish: mlx-zimage completion fish > ~/.config/fish/completions/mlx-zimage.fish
    """
    script = get_completion_class(shell)(ctx.find_root().command, {}, PROGRAM, "_MLX_ZIMAGE_COMPLETE")
    click.echo(script.source_template % script.source_vars())

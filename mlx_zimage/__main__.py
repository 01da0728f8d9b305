"""python -m mlx_zimage"""

from .cli import main

if __name__ == "__main__":
    main(prog_name="mlx-zimage")

"`python -m ssm_metarl` is the command line."
from ssm_metarl.cli import main
from ssm_metarl.stops import run_program


def program(): return run_program(main)  # -> exit status; the console script `ssm-metarl` calls it, too


if __name__ == '__main__': raise SystemExit(program())

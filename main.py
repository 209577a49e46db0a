"The command line, run from a clone: `python main.py {train,eval,adapt} --help`."
import sys

if __name__ == '__main__':
    sys.argv[0] = 'ssm-metarl'  # by this name the package knows that it is the program (notebook 00_stops)
    from ssm_metarl.__main__ import program
    raise SystemExit(program())

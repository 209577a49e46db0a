"The command line, run from a clone: `python main.py {train,eval,adapt} --help`."
from ssm_metarl.cli import main

if __name__ == '__main__': raise SystemExit(main())

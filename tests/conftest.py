"For all tests: a program that was started in the background ignores Ctrl-C, and so would the programs that tests start."
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

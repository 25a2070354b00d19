"""What holds for all tests."""

import signal

# A shell that starts the tests in the background has switched Ctrl-C off, for them and for the runs they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

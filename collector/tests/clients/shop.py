"""A program that sends profiles of itself with Pyroscope's client for Python: shop.py URL."""

import sys
import time

import pyroscope


def hot_python():
    end = time.monotonic() + 6
    total = 0
    while time.monotonic() < end:
        total += sum(i * i for i in range(1000))
    return total


pyroscope.configure(
    application_name="shop.python",
    server_address=sys.argv[1],
    tags={"region": "eu", "version": "1.2"},
    sample_rate=100,
    oncpu=True,
)
with pyroscope.tag_wrapper({"controller": "checkout"}):
    hot_python()
# It sends the rest.
pyroscope.shutdown()

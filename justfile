# The same commands as in scripts/, for those who have just.
check *args:
    scripts/check {{args}}
lint:
    scripts/lint
test *args:
    scripts/test {{args}}
format:
    scripts/format
bench *args:
    scripts/bench {{args}}

"""What every preset makes of every tiny family is, bit for bit, what it was."""

from golden import differences, run


def test_plans_and_weights_are_those_of_the_table():
    assert differences(run()) == [], "on purpose? then: make golden"

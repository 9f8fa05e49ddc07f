"""What an observer sees of collectives."""

from lasp import comm


class Places(comm.Observer):
    """Numbers and places in the order in which this rank entered them."""

    def __init__(self):
        self.seen, self.open = [], set()

    def entered(self, call):
        self.seen.append((call.number, call.place))
        self.open.add(call)

    def left(self, call):
        self.open.remove(call)

"""Stands in for torch where a test is about processes: a zygote that is warm in milliseconds."""


class _Generator:
    def seed(self) -> None:
        pass


default_generator = _Generator()

from scanlm.errors import nearest


def test_nearest_offers_the_closest_name_else_all() -> None:
    assert nearest("blelock", ["blelloch", "sequential"]) == " Did you mean 'blelloch'?"
    assert nearest("WikiText103", ["wikitext-103", "embedded"]) == " Did you mean 'wikitext-103'?"
    assert nearest("zzz", ["b", "a"]) == " Known: a, b."


def test_something_else_than_a_name_is_near_to_none() -> None:
    assert nearest(None, ["b", "a"]) == " Known: a, b."

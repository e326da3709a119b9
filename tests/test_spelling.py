from groupdetr_fast.spelling import did_you_mean


def test_the_most_similar_name_is_offered_as_it_is_written():
    assert did_you_mean("preson", ["car", "person", "parson"]) == ": did you mean 'person'?"
    assert did_you_mean(" CAR ", ["Car", "bus"]) == ": did you mean 'Car'?"


def test_where_none_is_similar_the_sentence_ends_otherwise():
    assert did_you_mean("zebra", ["car"]) == ""
    assert did_you_mean("zebra", ["car"], otherwise="; there is car") == "; there is car"
    assert did_you_mean("zebra", []) == ""

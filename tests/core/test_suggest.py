from qe_dist.core.suggest import suggestion


def test_a_name_that_is_close_is_suggested_and_no_other():
    assert suggestion("smothquant", ["rtn", "smoothquant", "gptq"]) == ", did you mean 'smoothquant'?"
    assert suggestion("QE", ["qe", "rtn"]) == ", did you mean 'qe'?"
    assert suggestion("banana", ["rtn", "gptq"]) == ""
    assert suggestion("x", []) == ""

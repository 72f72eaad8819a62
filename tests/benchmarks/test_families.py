"""What benchmarks/families.py counts."""

from benchmarks.families import PARTS, counted


def test_it_counts_the_tests_of_a_family_that_passed() -> None:
    cases = [
        ("test_promise[qwen2_5_vl-streamed]", True),
        ("test_promise[qwen2_5_vl-claimed]", False),
        ("test_promise[llama-streamed]", True),
        ("test_vllm_computes_what_transformers_does[llama-1]", True),
        ("test_vllm_computes_what_transformers_does[llama-2]", False),
        ("test_other[llama]", False),
    ]
    assert counted(cases, PARTS["here"].columns) == {"llama": {"streamed": [1, 1]}, "qwen2_5_vl": {"streamed": [1, 2]}}
    assert counted(cases, PARTS["served"].columns) == {"llama": {"vLLM TP 1": [1, 1], "vLLM TP 2": [0, 1]}}

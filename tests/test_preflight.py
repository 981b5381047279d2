"""What is looked at before a start, beyond the values themselves."""

import pytest

from ai_ticket import preflight
from ai_ticket.settings import Settings


@pytest.mark.parametrize("url", ["local:/nowhere.gguf", "http://a|http://b,local:/nowhere.gguf"])
def test_the_model_of_a_bundled_server_wherever_it_stands(url: str) -> None:
    problems = preflight.problems(Settings(koboldcpp_api_url=url, ai_ticket_auth=False))
    assert [problem for problem in problems if problem.startswith(f"KOBOLDCPP_API_URL={url!r}: ")]


def test_servers_elsewhere_need_nothing_on_this_machine() -> None:
    problems = preflight.problems(Settings(koboldcpp_api_url="http://a|http://b,http://c", ai_ticket_auth=False))
    assert not [problem for problem in problems if problem.startswith("KOBOLDCPP")]

import pytest

from lilliput.core.errors import ConfigError, InputCorrupt, InputUnsafe
from lilliput.data import chat
from lilliput.data.chat import ChatTemplate

MESSAGES = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "yes"}]


def render(source: str, **options: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES, **options)  # type: ignore[arg-type]


def test_a_usual_template_renders_as_transformers_does() -> None:
    source = (
        "{{ bos_token }}{% for message in messages %}\n"
        "    {%- if message['role'] == 'user' %}\n"
        "{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}\n"
        "    {%- else %}\n"
        "{{ ' ' ~ message.content ~ eos_token }}\n"
        "    {%- endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    )
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers")
    expected = utils._compile_jinja_template(source).render(
        messages=MESSAGES, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": " hi\\n"}, {"role": "assistant", "content": "yes"}]'),
        ("{{ {'a': 'é<'} | tojson(indent=1) }}", '{\n "a": "é<"\n}'),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) }}{{ f(2) }}", "<1><2>"),
        ("{% for i in range(3) %}{{ i }}{% endfor %}", "012"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ 'a-b'.replace('-', '+') | replace('a', 'c') }}", "c+b"),
        ("{{ '%s-%02d' % ('a', 1) }}{{ '{} {:.2f}'.format(1, 2) }}{{ '%s' | format(3) }}", "a-011 2.003"),
        ("{{ '{0.__class__}'.format(1) }}", ""),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ messages[0].content.strip().split('i')[0] }}", "h"),
        ("{{ 'none' if tools is none else 'some' }}", "none"),
        ("{{ strftime_now('%Y') if strftime_now is defined else 'no date' }}", "no date"),
        ("{% if add_generation_prompt %}A{% endif %}", "A"),
        ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}.{% endfor %}", "user.assistant."),
        ("{{ 'x' * 3 ~ 2 ** 3 ~ 7 % 4 }}", "xxx83"),
    ],
)
def test_what_templates_use_works(source: str, expected: str) -> None:
    assert render(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.__init__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}{{ '{:>99999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 99999999) }}",
        "{{ '{a:>99999999}'.format_map({'a': 1}) }}",
        "{{ '%99999999d' | format(1) }}",
        "{{ '%*d' % (99999999, 1) }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set a = messages * 500 %}{% for i in a %}{% for j in a %}{% endfor %}{% endfor %}",
        "{{ 'x' * 999999999 }}",
        "{{ 999999999 * 'x' }}",
        "{{ [1] * 999999999 }}",
        "{{ 9 ** 999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'x'.ljust(999999999) }}",
        "{{ 'x' | indent(999999999, true) }}",
        "{{ ('x' * 9999999).replace('x', 'y' * 9999) }}",
        "{{ ('x' * 9999999) | replace('x', 'y' * 9999) }}",
        "{{ ('x' * 9999999).join(['a'] * 9999) }}",
        "{% set ns = namespace(x='xxxx') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xxxx') %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for i in range(2000) %}{{ 'x' * 9999999 }}{% endfor %}",
        "{{ [1] | tojson(indent=999999999) }}",
    ],
)
def test_attacks_are_refused(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_STEPS", 20_000)  # the same stop, sooner
    with pytest.raises(
        InputUnsafe, match=r"^chat template: refused \(.*\)\. Use a template from a source you trust\.$"
    ):
        render(source)


@pytest.mark.parametrize("source", ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}"])
def test_no_files_can_be_read(source: str) -> None:
    with pytest.raises(ConfigError, match="no loader"):
        render(source)


def test_messages_stay_as_they_were_after_an_attack_on_them() -> None:
    with pytest.raises(InputUnsafe):
        render("{{ messages[0].pop('role') }}")
    assert MESSAGES[0] == {"role": "user", "content": " hi\n"}


def test_a_refusal_by_the_template_reads_as_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^chat template: does not take these messages \(roles must alternate\)\."):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ConfigError, match="'x' is undefined"):
        render("{{ x.y }}")


def test_only_known_options_pass_and_none_replaces_ours() -> None:
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert render("{{ tools | length }}", tools=[{}]) == "1"
    for name in ("bos_token", "chat_template", "tokenize", "raise_exception", "range"):
        with pytest.raises(ConfigError, match=rf"'{name}' is not an option\. Templates take date_string, documents"):
            render("", **{name: 1})


def test_a_template_that_does_not_parse_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    for source in ("{% if %}", "{{ x | nosuchfilter }}", "{% for %}", "{{ " + "(" * 5000):
        with pytest.raises(InputCorrupt, match="does not parse"):
            render(source)
    monkeypatch.setattr(chat, "MAX_SOURCE", 10)
    with pytest.raises(InputCorrupt, match="11 characters long"):
        render("x" * 11)


def test_each_rendering_has_its_own_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_STEPS", 1000)
    template = ChatTemplate("{% for i in range(450) %}{% endfor %}x", {})
    assert [template.render([]) for _ in range(3)] == ["x"] * 3


def test_templates_are_told_apart_by_their_hash() -> None:
    assert ChatTemplate("a", {}).sha256 == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"

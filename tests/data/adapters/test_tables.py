"""Whatever is wrong with an annotation file is named with file, line and column."""

import pytest

from mirasol.data.datasets.contract import AnnotationError, Rows
from mirasol.data.datasets.registry import read_dataset
from mirasol.data.datasets.tables import (
    JsonArray,
    is_whole_number,
    read_csv_header,
    read_csv_rows,
    read_json_lines,
    read_json_object,
    read_names,
)


def fatal(call) -> tuple:
    with pytest.raises(AnnotationError) as caught:
        call()
    problem = caught.value.problem
    assert "\n" not in str(caught.value)
    return problem.kind, problem.file, problem.line, problem.column, problem.message


def rows_of(path, columns=("a", "b"), **settings):
    rows = Rows()
    return list(read_csv_rows(path, "x.csv", rows, columns, **settings)), rows


def test_malformed_json_is_told_with_line_and_column(data):
    path = data.put("x.json", '[{"a": 1},\n {"a": }]')
    assert fatal(lambda: JsonArray(path, "x.json"))[:4] == ("malformed", "x.json", 2, 8)
    assert "must hold an array" in fatal(lambda: JsonArray(data.put("y.json", '{"a": 1}'), "y.json"))[4]
    assert "must hold one object" in fatal(lambda: read_json_object(data.put("y.json", "[]"), "y.json"))[4]
    deep = data.put("deep.json", "[" * 100_000)
    assert fatal(lambda: JsonArray(deep, "deep.json"))[0] == "malformed"


def test_items_of_an_array_know_their_place(data):
    items = JsonArray(data.put("x.json", '[{"a": "]"},\n  {"a": "ü"} , {"b": 1}, 7]'), "x.json")
    assert [items.locate(index) for index in range(4)] == [(1, 2), (2, 3), (2, 16), (2, 26)]
    rows = Rows()
    assert [index for index, _ in items.iterate_valid(rows, {"a": str})] == [0, 1]
    assert [(p.line, p.column) for p in rows.problems] == [(2, 16), (2, 26)]
    assert "field 'a' is missing; found 'b'" in rows.problems[0].message
    assert "must be an object with a, not a number" in rows.problems[1].message
    assert rows.reasons == {"malformed": 2}


def test_a_truth_value_is_no_number(data):
    rows = Rows()
    assert not list(read_json_lines(data.put("x.jsonl", '{"a": true}'), "x", rows, {"a": int}))
    assert "must be a number, not true or false" in rows.problems[0].message


def test_bad_lines_of_jsonl_cost_themselves_alone(data):
    path = data.put("x.jsonl", b'{"a": "1"}\n\n{"a": }\n{"a": "\xff"}\r\n{"a": "5"}')
    rows = Rows()
    assert [line for line, _ in read_json_lines(path, "x", rows, {"a": str})] == [1, 5]
    assert [(p.kind, p.line, p.column) for p in rows.problems] == [("malformed", 3, 7), ("not UTF-8", 4, None)]


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5_000], ids=["deep", "long number"])
def test_what_python_cannot_read_is_told_as_malformed(data, line):
    rows = Rows()
    path = data.put("x.jsonl", line + '\n{"a": "1"}\n')
    assert [number for number, _ in read_json_lines(path, "x", rows, {"a": str})] == [2]
    assert [(p.kind, p.line) for p in rows.problems] == [("malformed", 1)]
    assert fatal(lambda: JsonArray(data.put("x.json", f"[{line}]"), "x.json"))[0] == "malformed"
    data.put("train.jsonl", line)
    assert read_dataset("folder", data.root, "train").reasons == {"malformed": 1}


def test_whole_numbers_are_those_that_int_reads():
    assert is_whole_number("0") and is_whole_number("000012")
    assert not any(map(is_whole_number, ("²", "٣", "-1", "1.0", "", "9" * 5_000)))


def test_csv_fields_stay_text(data):
    read, rows = rows_of(data.put("x.csv", "\ufeffb, a ,c\r\nNA,None,1\r\nnull,007,\r\n"))
    assert [row for _, row in read] == [{"a": "None", "b": "NA"}, {"a": "007", "b": "null"}]
    assert not rows.problems


def test_a_wrong_header_tells_what_was_expected_and_found(data):
    kind, _, line, _, message = fatal(lambda: rows_of(data.put("x.csv", "a,c\n1,2\n")))
    assert (kind, line, message) == ("wrong header", 1, "wrong header: expected a,b; found a,c")
    assert "found nothing" in fatal(lambda: rows_of(data.put("x.csv", "")))[4]
    assert "column 'b' appears twice; found a,b,b" in fatal(lambda: rows_of(data.put("x.csv", "a,b,b\n1,2,3\n")))[4]
    assert rows_of(data.put("x.csv", "a,b,c,c\n1,2,3,4\n"))[0] == [(2, {"a": "1", "b": "2"})], "no column of ours"


def test_rows_of_another_width_are_skipped_with_line_and_column(data):
    read, rows = rows_of(data.put("x.csv", 'a,b\n1,"two\nlines"\n1\n"x, y",2,3\n5,6\n'))
    assert [line for line, _ in read] == [2, 6]
    assert [(p.line, p.column, p.message) for p in rows.problems] == [
        (4, 2, "1 fields, 2 expected"),
        (5, 9, "3 fields, 2 expected"),
    ]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_the_delimiter_is_the_one_of_the_first_row(data, delimiter):
    path = data.put("x.csv", f"b{delimiter}a\n1,5{delimiter}2\n")
    assert rows_of(path)[0] == [(2, {"a": "2", "b": "1,5"})]
    assert read_csv_header(path) == ["b", "a"]
    assert rows_of(path, header=False)[0][1] == (2, {"a": "1,5", "b": "2"})
    bare = data.put("y.csv", f"x, y, z{delimiter}1\n")
    assert rows_of(bare, header=False)[0] == [(1, {"a": "x, y, z", "b": "1"})]
    either = data.put("z.csv", f"x,y{delimiter}1\n")
    assert rows_of(either, header=False)[0] == [(1, {"a": "x", "b": f"y{delimiter}1"})], "the comma goes first"


def test_a_delimiter_that_is_not_known_shows_in_the_message(data):
    assert "expected a,b; found a|b" in fatal(lambda: rows_of(data.put("x.csv", "a|b\n1|2\n")))[4]


def test_the_header_of_a_utf16_table_is_read(data):
    path = data.put("x.csv", "ä\tb\n1\t2\n".encode("utf-16"))
    assert read_csv_header(path) == ["ä", "b"]
    assert rows_of(path, columns=("ä",))[0] == [(2, {"ä": "1"})]
    assert read_csv_header(data.put("y.csv", "a,b\n".encode("utf-16-le"))) == []


def test_a_quote_that_does_not_close_is_told_where_it_opened(data):
    path = data.put("x.csv", 'a,b\n1,2\n3,"four\n5,6\n')
    assert fatal(lambda: rows_of(path))[:4] == ("malformed", "x.csv", 3, 3)


def test_bytes_that_are_not_utf8_cost_their_row_alone(data):
    read, rows = rows_of(data.put("x.csv", b"a,b\n1,\xe9t\xe9\n2,ok\n"))
    assert [row["b"] for _, row in read] == ["ok"]
    assert [(p.kind, p.line) for p in rows.problems] == [("not UTF-8", 2)]


def test_comment_lines_count_as_lines(data):
    path = data.put("x.csv", '# one\n# two\nx, "a,b"\ny\n')
    read, rows = rows_of(path, header=False, skip_initial_space=True, comment="#")
    assert read == [(3, {"a": "x", "b": "a,b"})]
    assert rows.problems[0].line == 4


def test_lists_of_names(data):
    assert read_names(data.put("x.txt", "b\n\na, c\n"), "x.txt") == ("b", "a, c")
    assert fatal(lambda: read_names(data.put("x.txt", "b\na\nb\n"), "x.txt"))[2] == 3
    assert "contains no names" in fatal(lambda: read_names(data.put("x.txt", " \n"), "x.txt"))[4]
    assert fatal(lambda: read_names(data.put("x.txt", b"a\n\xff\n"), "x.txt"))[:3] == ("not UTF-8", "x.txt", 2)

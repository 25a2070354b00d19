from pretrain.data.sampling.substitute import BadList, BadRecord


def record(key: str) -> BadRecord:
    return BadRecord(position=1, shard="s.tar", key=key, reason="empty", substitute="s.tar/x", passed_over=False)


def test_a_list_that_a_kill_cut_goes_on_and_can_be_read_again(tmp_path):
    told = []
    BadList(tmp_path, rank=0, say=told.append).add(record("a"))
    path = tmp_path / "bad_samples.rank0.jsonl"
    with path.open("a") as file:
        file.write('{"position": 4, "sha')
    again = BadList(tmp_path, rank=0, say=told.append)
    assert again.known() == {("s.tar", "a")}
    again.add(record("b"))
    assert BadList(tmp_path, rank=0, say=told.append).known() == {("s.tar", "a"), ("s.tar", "b")}
    assert told[0] == "bad sample s.tar/a: empty; used s.tar/x instead"

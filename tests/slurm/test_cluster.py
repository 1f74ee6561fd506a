def test_the_nodes_take_jobs(cluster):
    assert "g1801l4001 idle" in cluster.run("sinfo", "-h", "-N", "-o", "%N %T").stdout

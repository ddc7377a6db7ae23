from distmeta.runs import RunFolder
def report(runs):
    return runs[0].path / 'report'

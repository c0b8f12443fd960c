def write_report(study):
    from toolkit.study.table import write_table
    write_table(study); return study.folder/"x"

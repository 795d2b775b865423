"""Any measured number against seconds, iterations or oracle calls."""

from benchopt import BasePlot

AXES = {
    "seconds": "time",
    "iterations": "objective_steps",
    "gradient calls": "objective_gradient_calls",
    "oracle calls": "objective_oracle_calls",
}


class Plot(BasePlot):
    """Medians over repetitions and seeds; calls are those of 64 rows."""

    name = "progress"
    type = "scatter"
    options = {"dataset": ..., "objective": ..., "objective_column": ..., "x_axis": list(AXES)}

    def plot(self, df, dataset, objective, objective_column, x_axis):
        here = df[(df["dataset_name"] == dataset) & (df["objective_name"] == objective)]
        curves = []
        for solver, rows in here.groupby("solver_name"):
            median = rows.groupby("stop_val")[[AXES[x_axis], objective_column]].median()
            x, y = (median[name].tolist() for name in (AXES[x_axis], objective_column))
            curves.append({"x": x, "y": y, "label": solver, **self.get_style(solver)})
        return curves

    def get_metadata(self, df, dataset, objective, objective_column, x_axis):
        return {"title": f"{objective}\nData: {dataset}", "xlabel": x_axis, "ylabel": objective_column}

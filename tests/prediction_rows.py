"""Rows of predictions for the tests of metrics: one grounding answer, one of grounded QA."""


def tvg(pred, truth=((4, 8),), **fields):
    return {"id": "x", "task": "tvg", "pred_segments": pred, "segments": truth, "duration": 20.0} | fields


def gqa(choice, pred, truth=((4, 8),), **fields):
    row = {
        "id": "x",
        "task": "gqa",
        "pred_choice": choice,
        "pred_segments": pred,
        "answer": "B",
        "segments": truth,
    }
    return row | {"duration": 20.0} | fields

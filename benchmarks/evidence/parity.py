"""The triplet loss of this library and that of PyTorch Metric Learning, at the same rate and margin: four epochs on the classes that a search trains on, map@r on the validation classes after each. Prints a line of JSON for each run.

Run as the plans are, in a folder with the images and weights in data/: python parity.py cars.toml"""
import argparse, json, torch
from dmlfast.all import *
from dmlfast.study.checks import with_settings

p = argparse.ArgumentParser(description=__doc__)
p.add_argument('plan')
exp = Experiment(p.parse_args().plan, 'no-results.jsonl') # nothing is written there
torch.set_num_threads(1)
same = dict(triplet={'fit.lr':3e-4, 'loss.margin':.1}, pml_triplet={'pml.lr':3e-4, 'pml.margin':.1})
for seed in 1,2,3:
    for method,settings in same.items():
        scores = []
        exp.trainer(method)(with_settings(exp.settings(method), {**settings, 'fit.n_epoch':4, 'seed':seed}), exp.ds, 'val', lambda epoch, score: scores.append(round(score, 4)))
        print(json.dumps(dict(method=method, seed=seed, scores=scores)), flush=True)

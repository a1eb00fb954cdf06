"""Data: from conversation files and scans to batches.

Text, from a file to tokens:

    schema.py          convert records of the original's format to the current one
    conversation.py    read conversation files: `Conversations` holds millions in columns, with `ragged.py`
    tokenize.py        write a conversation in a template: token ids and the mask of supervised tokens

A volume, from a file to an array:

    voxels.py          `open_voxels`: open a file of any format; shape, affine, voxel sizes and frames
    background.py      decide which voxels are background
    volume.py          `load_volume`: `open_volume` opens a file by `open_voxels` and checks that it fits the modality;
                       `preprocess` orients, resamples or crops, and scales its voxels
    cache.py           `Sources` and `VolumeCache`: the same for a whole run, with checks for changed files and, in the
                       cache, preprocessed volumes on disk
    checked.py         remember what the check of each volume established, so that the next start only looks it up
    shares.py          divide the checks between the processes of a run
    threads.py         map a function over many items in threads
    augment.py         change a preprocessed volume at random

Batches:

    epoch_plan.py      decide which conversations make each update
    collate.py         pad encoded conversations and their volumes to one `Batch`
    loader.py          `Dataset`: everything a run needs, read and checked; batches of a training step or an evaluation

Before training: `bids/`, `tables.py`, `ignore_file.py` and `subject_split.py` make conversations from a BIDS data set,
`validation/` checks data and writes its page, `inputs.py` records what a run has read.
"""

"""Make conversations from a BIDS data set: tables give the questions and answers, file names give the scans."""

"What `from dmlfast.all import *` gives: what one calls. Helpers are imported from their rooms."
from .files.images import open_image
from .files.review import LabelReview
from .files.drawing import show_neighbours
from .losses import (
    register_loss, MetricLoss, Margin, CombinedLoss, OtherLoss, lr_mults, register_miner, Miner, RandomMiner, SemiHardMiner,
    SoftHardMiner, BatchHardMiner, DistanceWeightedMiner, MultiSimilarityMiner, TripletLoss, DRTripletLoss, ContrastiveLoss, MarginLoss,
    NPairLoss, MultiSimilarityLoss, DRMultiSimilarityLoss, ProxyLoss, ProxyNCALoss, DRProxyNCALoss, ProxyAnchorLoss, NormFaceLoss,
    CosFaceLoss, ArcFaceLoss, SubCenterArcFaceLoss, SoftTripleLoss, RecallAtKLoss, SupConLoss, CircleLoss, MatryoshkaLoss,
    ThresholdConsistency, AntiCollapse)
from .models import Embedder, bn_inception, embedder_splitter, stage_splitter
from .retrieval import (
    Embedded, RetrievalResult, evaluate_retrieval, evaluate_protocol, evaluate_random_gallery, neighbours, register_metric,
    register_reranker, QueryExpansion, KReciprocal)
from .deploy import ImageEmbedder, load_embedder, load_onnx
from .data import (
    ClassSplitter, ClassBlock, BalancedSampler, BalancedDL, SetEpoch, hard_pairs, register_reader, MetricDataset, data_folder,
    bad_images, cub200, cars196, online_products, inshop, vehicle_id, glyphs)
from .train import (
    metric_learner, MetricLearner, recipes, Recipe, RetrievalMetrics, SelfSupervisedRanking, RankingLoss, GradedViews, LargeBatch,
    BatchMemory, TrainingDoctor, Checkpoint, Interpolate, plain_progress, FeatureSet, Gain)
from .look import RetrievalInterpretation, triplet_table, plot_curves
from .study import (
    Experiment, mean_interval, tune, plot_study, importances, make_learner, train_settings, tune_settings, check_settings, load_settings,
    save_settings, register_setting)

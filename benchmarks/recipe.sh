#!/usr/bin/env bash
# Train MIAR with tokens and the peers of its table, with a time limit for each network:
#
#   MINUTES=10 benchmarks/recipe.sh brats <dataset_dir> <split.json> <output_dir> tokenizer miar swinir rcan mhca vae ldm
#
# Run it in the root of the repository. The tokenizer comes before miar, and vae, the autoencoder of the latent diffusion
# model, before ldm. mmhca, disc_diff and diffmsr are guided by the other contrast (brats only); diffmsr trains its two
# stages in 40 and 60 % of the minutes. estimator is the network without tokens, with a guide where the bundle has one.
# Peers train on the same slices and augmentations, but only on the degradation of the table, which is to their advantage
# there; MIAR also trains on other blurs and noise. rcan_through_plane is the peer of benchmarks.through_plane.
# DROPOUT (0) is that of the tokenizer's scales: the paper's 0.1 costs 0.25 dB in docs/results/ablations.md. The ablations
# full, no-teacher-forcing, no-rope, no-self-correction and no-dropout (which also trains a tokenizer for MINUTES) are written
# to <output_dir>/ablations/<name>.
#
# The paper's own system, with its optimizer, rates and batch sizes (the bundles' paper_*.json; MINUTES for each stage):
# paper-tokenizer, then paper, written to <output_dir>/paper/full; paper-no-rope needs that tokenizer, and paper-no-dropout
# trains its own. ADVERSARIAL_EPOCH (8) is the epoch of 500 steps with which the adversarial loss begins.
#
# WORKERS (7) is the number of loader processes. EXTRA is added to every command: EXTRA="--resume True" goes on with runs
# that were interrupted.
set -euo pipefail
bundle=$1 data=$2 split=$3 output=$4
shift 4
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}.

common=(
  --bundle_root "bundles/miar_$bundle" --dataset_dir "$data" --split_file "$split" --output_dir "$output"
  --num_slices 0 --num_workers "${WORKERS:-7}" --max_minutes "${MINUTES:-10}"
  --max_epochs 1000 --epoch_length 500 --val_interval 4 --checkpoint_interval 2 --log_interval 100
  --warmup_steps 200 --ema_momentum 0.004
)
if [ "$bundle" = brats ]; then common+=(--datalist#contrasts "['t1','t2']"); else common+=(--val_num_slices 0); fi

train() { # configs, separated by commas, and options
  local configs=$1
  shift
  # shellcheck disable=SC2086  # EXTRA is several words
  python3 -m monai.bundle run training --config_file "[$configs]" "${common[@]}" "$@" ${EXTRA:-}
}

stage1="'bundles/miar_$bundle/configs/train_stage1.json'" stage2="'bundles/miar_$bundle/configs/train.json'"
tokenizer() {
  train "$stage1" --batch_size 32 --lr 4e-4 --final_lr 1e-5 --adversarial_weight 0 --tokenizer_def#dropout "${DROPOUT:-0}" "$@"
}
miar() { train "$stage2" --batch_size 32 --lr 5e-4 --final_lr 5e-6 "$@"; }
guided() { # peer and options
  local peer=$1
  shift
  train "$stage2,'benchmarks/peers/guided.json','benchmarks/peers/$peer.json'" --batch_size 16 "$@"
}
ablation() { # name and options
  local into=$output/ablations/$1
  shift
  mkdir -p "$into"
  [ -f "$into/tokenizer.pt" ] || cp "$output/tokenizer.pt" "$into"
  miar --output_dir "$into" "$@"
}

paper_tokenizer() { # name of the run and options
  local into=$output/paper/$1
  shift
  train "$stage1,'bundles/miar_$bundle/configs/paper_train_stage1.json'" --output_dir "$into" \
    --adversarial_start_epoch "${ADVERSARIAL_EPOCH:-8}" "$@"
}
paper() { # name of the run and options
  local into=$output/paper/$1
  shift
  train "$stage2,'bundles/miar_$bundle/configs/paper_train.json'" --output_dir "$into" "$@"
}

for what in "$@"; do
  case $what in
    tokenizer) tokenizer ;;
    miar) miar ;;
    full) ablation full ;;
    no-teacher-forcing) ablation no-teacher-forcing --teacher_forcing 0 ;;
    no-rope) ablation no-rope --network_def#positions learned ;;
    no-self-correction) ablation no-self-correction --self_correction 0 ;;
    no-dropout)
      DROPOUT=0 tokenizer --output_dir "$output/ablations/no-dropout"
      ablation no-dropout
      ;;
    paper-tokenizer) paper_tokenizer full ;;
    paper) paper full ;;
    paper-no-rope) paper no-rope --tokenizer_path "$output/paper/full/tokenizer.pt" --network_def#positions learned ;;
    paper-no-dropout)
      paper_tokenizer no-dropout --tokenizer_def#dropout 0
      paper no-dropout
      ;;
    estimator) train "'bundles/miar_$bundle/configs/train_estimator.json'" --output_dir "$output/estimator" ;;
    mmhca | disc_diff) guided "$what" ;;
    diffmsr)
      guided diffmsr_stage1 --max_minutes "$(awk "BEGIN { print 0.4 * ${MINUTES:-10} }")"
      guided diffmsr --max_minutes "$(awk "BEGIN { print 0.6 * ${MINUTES:-10} }")"
      ;;
    *) train "$stage2,'benchmarks/peers/$what.json'" --batch_size 16 ;;
  esac
done

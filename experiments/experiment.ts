export interface ExperimentOptions {
  readonly backend: 'auto' | 'kvm' | 'software';
  readonly seed: number;
}

export interface Findings {
  /** What was measured, for other programs. */
  readonly data: unknown;
  /** The same for people. */
  readonly lines: readonly string[];
  readonly svg: string;
}

export interface Experiment {
  readonly title: string;
  run(options: ExperimentOptions): Findings;
}

BEGIN TRANSACTION;
CREATE TABLE acceptance (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	study_id INTEGER, 
	config_from_id INTEGER NOT NULL, 
	config_to_id INTEGER NOT NULL, 
	rule JSON NOT NULL, 
	state VARCHAR NOT NULL, 
	reason VARCHAR NOT NULL, 
	n_pairs INTEGER NOT NULL, 
	hl DOUBLE, 
	ci_lo DOUBLE, 
	ci_hi DOUBLE, 
	p DOUBLE, 
	cv DOUBLE, 
	loss_bounds JSON NOT NULL, 
	initiated_by VARCHAR NOT NULL, 
	decided_at DOUBLE NOT NULL, 
	CONSTRAINT pk_acceptance PRIMARY KEY (id), 
	CONSTRAINT fk_acceptance_config_from_id_config FOREIGN KEY(config_from_id) REFERENCES config (id), 
	CONSTRAINT fk_acceptance_config_to_id_config FOREIGN KEY(config_to_id) REFERENCES config (id), 
	CONSTRAINT fk_acceptance_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_acceptance_model_id_model FOREIGN KEY(model_id) REFERENCES model (id), 
	CONSTRAINT fk_acceptance_study_id_study FOREIGN KEY(study_id) REFERENCES study (id)
);
INSERT INTO "acceptance" VALUES(1,1,1,NULL,4,1,'{"metric": "goodput_requests_per_s", "guards": ["ttft_p95_s", "tpot_p95_s", "error_frac", "quality"], "targets": {"tpot_p95_s": 0.05}, "num_rounds": 0, "num_pairs": 32, "alpha": 0.025, "guard_alpha": 0.05, "min_effect_frac": 0.01, "max_loss_frac": 0.03, "max_error_frac": 0.005, "max_cv_frac": 0.08, "needs_gain": true}','held','not_enough',0,NULL,NULL,NULL,NULL,NULL,'{}','asset',3.0);
CREATE TABLE acceptance_window (
	id INTEGER NOT NULL, 
	acceptance_id INTEGER NOT NULL, 
	config_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	stage VARCHAR NOT NULL, 
	round INTEGER NOT NULL, 
	arrival_order INTEGER NOT NULL, 
	status VARCHAR NOT NULL, 
	metrics JSON NOT NULL, 
	started_at DOUBLE NOT NULL, 
	ended_at DOUBLE NOT NULL, 
	CONSTRAINT pk_acceptance_window PRIMARY KEY (id), 
	CONSTRAINT fk_acceptance_window_acceptance_id_acceptance FOREIGN KEY(acceptance_id) REFERENCES acceptance (id), 
	CONSTRAINT fk_acceptance_window_config_id_config FOREIGN KEY(config_id) REFERENCES config (id), 
	CONSTRAINT uq_acceptance_window_acceptance_id_number UNIQUE (acceptance_id, number)
);
INSERT INTO "acceptance_window" VALUES(1,1,4,0,'test',0,1,'ok','{"goodput_requests_per_s": 2.0, "quality": null}',1.0,2.0);
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0008');
CREATE TABLE config (
	id INTEGER NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	"values" JSON NOT NULL, 
	CONSTRAINT pk_config PRIMARY KEY (id), 
	CONSTRAINT uq_config_sha256 UNIQUE (sha256)
);
INSERT INTO "config" VALUES(1,'d65c7abc3e3eaa3a15979be538ab28ff2c6161b97ad775897198429469411764','{"token_budget": 1024}');
INSERT INTO "config" VALUES(2,'5a73cadeb31a9b8a426fdba11225be7000e2faf5413d1652734bc4acb98d4e6f','{"hbm_budget": null, "token_budget": 1024}');
INSERT INTO "config" VALUES(3,'d9175436091e5f2a6270d01bb1a0a228d916b1bc402e237cf30421877f9b60ff','{"token_budget": 512}');
INSERT INTO "config" VALUES(4,'cec19e93b82bbed4705d568ede57ecaf79a5711aaabde27c0f207cc484d239f1','{"token_budget": 2048}');
INSERT INTO "config" VALUES(5,'81b42f4a89b109b92f7d5469539d490ea09bcc561187a7997889ee6b02e34902','{"token_budget": 1536}');
CREATE TABLE decision (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	config_id INTEGER NOT NULL, 
	made_at DOUBLE NOT NULL, 
	reason VARCHAR NOT NULL, 
	predicted_score DOUBLE, 
	current_score DOUBLE, 
	CONSTRAINT pk_decision PRIMARY KEY (id), 
	CONSTRAINT fk_decision_config_id_config FOREIGN KEY(config_id) REFERENCES config (id), 
	CONSTRAINT fk_decision_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_decision_model_id_model FOREIGN KEY(model_id) REFERENCES model (id)
);
INSERT INTO "decision" VALUES(1,1,1,3,1.0,'asset',1.0,1.0);
CREATE TABLE hardware (
	id INTEGER NOT NULL, 
	fingerprint VARCHAR NOT NULL, 
	CONSTRAINT pk_hardware PRIMARY KEY (id), 
	CONSTRAINT uq_hardware_fingerprint UNIQUE (fingerprint)
);
INSERT INTO "hardware" VALUES(1,'cpu:asset:2:4GiB');
CREATE TABLE last_known_good (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	config_id INTEGER NOT NULL, 
	moved_at DOUBLE NOT NULL, versions JSON, 
	CONSTRAINT pk_last_known_good PRIMARY KEY (id), 
	CONSTRAINT fk_last_known_good_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_last_known_good_model_id_model FOREIGN KEY(model_id) REFERENCES model (id), 
	CONSTRAINT fk_last_known_good_config_id_config FOREIGN KEY(config_id) REFERENCES config (id)
);
INSERT INTO "last_known_good" VALUES(1,1,1,5,2.0,'{"torch": "2"}');
CREATE TABLE link_calibration (
	id INTEGER NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	gpu_name VARCHAR NOT NULL, 
	driver VARCHAR NOT NULL, 
	link VARCHAR NOT NULL, 
	torch VARCHAR NOT NULL, 
	triton VARCHAR NOT NULL, 
	h2d_bytes_per_s DOUBLE NOT NULL, 
	d2h_bytes_per_s DOUBLE NOT NULL, 
	entries JSON NOT NULL, 
	measured_at DOUBLE NOT NULL, 
	CONSTRAINT pk_link_calibration PRIMARY KEY (id), 
	CONSTRAINT uq_link_calibration_sha256 UNIQUE (sha256)
);
INSERT INTO "link_calibration" VALUES(1,'f55e37c3b5ea25301d3518e2c245af8f9abb9d6617db40167bc213fdecd877ac','asset','1','gen5x16','2','3',50000000000.0,40000000000.0,'[{"bytes_per_s": 48000000000.0, "direction": "h2d", "path": "kernel", "piece_bytes": 16384, "programs": 16, "slowdown": 1.1, "tile_bytes": 32768}]',1.0);
CREATE TABLE model (
	id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	dtype VARCHAR NOT NULL, 
	CONSTRAINT pk_model PRIMARY KEY (id), 
	CONSTRAINT uq_model_name_dtype UNIQUE (name, dtype)
);
INSERT INTO "model" VALUES(1,'smollm2-135m','float32');
CREATE TABLE profile (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	software_id INTEGER NOT NULL, 
	config_id INTEGER NOT NULL, 
	status VARCHAR NOT NULL, 
	workload VARCHAR NOT NULL, 
	objective VARCHAR NOT NULL, 
	default_scores JSON NOT NULL, 
	winner_scores JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	pinned BOOLEAN NOT NULL, shape JSON, 
	CONSTRAINT pk_profile PRIMARY KEY (id), 
	CONSTRAINT fk_profile_config_id_config FOREIGN KEY(config_id) REFERENCES config (id), 
	CONSTRAINT fk_profile_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_profile_model_id_model FOREIGN KEY(model_id) REFERENCES model (id), 
	CONSTRAINT fk_profile_software_id_software FOREIGN KEY(software_id) REFERENCES software (id)
);
INSERT INTO "profile" VALUES(1,1,1,1,2,'verified','chat','throughput','[1.0]','[2.0]',1.0,1,'{"num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "max_position": 8192, "num_parameters": 134515008, "tied_embeddings": true}');
CREATE TABLE regime (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	centroid JSON NOT NULL, 
	signature VARCHAR NOT NULL, 
	seen_s DOUBLE NOT NULL, 
	seen_at DOUBLE NOT NULL, 
	config_id INTEGER, 
	verified_at DOUBLE, 
	versions JSON NOT NULL, 
	CONSTRAINT pk_regime PRIMARY KEY (id), 
	CONSTRAINT fk_regime_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_regime_model_id_model FOREIGN KEY(model_id) REFERENCES model (id), 
	CONSTRAINT fk_regime_config_id_config FOREIGN KEY(config_id) REFERENCES config (id), 
	CONSTRAINT uq_regime_hardware_id_model_id_number UNIQUE (hardware_id, model_id, number)
);
INSERT INTO "regime" VALUES(1,1,1,1,'{"input_tokens_p50": 9.0, "requests_per_s": 0.5}','asset',900.0,2.0,5,2.0,'{"torch": "2"}');
CREATE TABLE rollout (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	config_from_id INTEGER NOT NULL, 
	config_to_id INTEGER NOT NULL, 
	state VARCHAR NOT NULL, 
	reason VARCHAR NOT NULL, 
	initiated_by VARCHAR NOT NULL, 
	at DOUBLE NOT NULL, regime_number INTEGER, profile VARCHAR, 
	CONSTRAINT pk_rollout PRIMARY KEY (id), 
	CONSTRAINT fk_rollout_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_rollout_model_id_model FOREIGN KEY(model_id) REFERENCES model (id), 
	CONSTRAINT fk_rollout_config_from_id_config FOREIGN KEY(config_from_id) REFERENCES config (id), 
	CONSTRAINT fk_rollout_config_to_id_config FOREIGN KEY(config_to_id) REFERENCES config (id)
);
INSERT INTO "rollout" VALUES(1,1,1,1,5,'verifying','canary','asset',1.0,NULL,NULL);
INSERT INTO "rollout" VALUES(2,1,1,1,5,'verifying','committed','asset',2.0,1,'profile #1 on sparsed 0.1.0');
CREATE TABLE rollup (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	period_s INTEGER NOT NULL, 
	started_at DOUBLE NOT NULL, 
	metric VARCHAR NOT NULL, 
	num_samples INTEGER NOT NULL, 
	mean DOUBLE NOT NULL, 
	p50 DOUBLE NOT NULL, 
	p95 DOUBLE NOT NULL, 
	CONSTRAINT pk_rollup PRIMARY KEY (id), 
	CONSTRAINT fk_rollup_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_rollup_model_id_model FOREIGN KEY(model_id) REFERENCES model (id)
);
CREATE TABLE software (
	id INTEGER NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	versions JSON NOT NULL, 
	CONSTRAINT pk_software PRIMARY KEY (id), 
	CONSTRAINT uq_software_sha256 UNIQUE (sha256)
);
INSERT INTO "software" VALUES(1,'8d01f8c2b9f9816acb5bcc0ba29a6cea981197fc4cd8762d70e688288cc3cf58','{"sparsed": "0.1.0"}');
CREATE TABLE study (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	software_id INTEGER NOT NULL, 
	workload_id INTEGER NOT NULL, 
	objective VARCHAR NOT NULL, 
	slo JSON NOT NULL, 
	seed INTEGER NOT NULL, 
	started_at DOUBLE NOT NULL, space JSON, 
	CONSTRAINT pk_study PRIMARY KEY (id), 
	CONSTRAINT fk_study_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_study_model_id_model FOREIGN KEY(model_id) REFERENCES model (id), 
	CONSTRAINT fk_study_software_id_software FOREIGN KEY(software_id) REFERENCES software (id), 
	CONSTRAINT fk_study_workload_id_workload FOREIGN KEY(workload_id) REFERENCES workload (id)
);
INSERT INTO "study" VALUES(1,1,1,1,1,'throughput','{"min_recall": 0.5, "tpot_s": null, "ttft_s": null}',1,1.0,'{"token_budget": [512, 1024]}');
CREATE TABLE trial (
	id INTEGER NOT NULL, 
	study_id INTEGER NOT NULL, 
	config_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	arm VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	score DOUBLE, 
	spread_frac DOUBLE, 
	reason VARCHAR NOT NULL, 
	started_at DOUBLE NOT NULL, 
	ended_at DOUBLE NOT NULL, device VARCHAR, 
	CONSTRAINT pk_trial PRIMARY KEY (id), 
	CONSTRAINT fk_trial_config_id_config FOREIGN KEY(config_id) REFERENCES config (id), 
	CONSTRAINT fk_trial_study_id_study FOREIGN KEY(study_id) REFERENCES study (id), 
	CONSTRAINT uq_trial_study_id_number UNIQUE (study_id, number)
);
INSERT INTO "trial" VALUES(1,1,1,0,'default','ok',2.0,0.1,'',0.0,0.0,'cuda:1');
CREATE TABLE trial_metric (
	id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	name VARCHAR NOT NULL, 
	value DOUBLE NOT NULL, 
	CONSTRAINT pk_trial_metric PRIMARY KEY (id), 
	CONSTRAINT fk_trial_metric_trial_id_trial FOREIGN KEY(trial_id) REFERENCES trial (id), 
	CONSTRAINT uq_trial_metric_trial_id_name UNIQUE (trial_id, name)
);
INSERT INTO "trial_metric" VALUES(1,1,'duration_s',3.0);
CREATE TABLE tuner_control (
	id INTEGER NOT NULL, 
	pins JSON NOT NULL, 
	frozen BOOLEAN NOT NULL, 
	safe_since DOUBLE, 
	CONSTRAINT pk_tuner_control PRIMARY KEY (id)
);
INSERT INTO "tuner_control" VALUES(1,'["prefill_chunk"]',1,NULL);
CREATE TABLE tuner_marker (
	id INTEGER NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	model_id INTEGER NOT NULL, 
	rollout_id INTEGER NOT NULL, 
	CONSTRAINT pk_tuner_marker PRIMARY KEY (id), 
	CONSTRAINT fk_tuner_marker_hardware_id_hardware FOREIGN KEY(hardware_id) REFERENCES hardware (id), 
	CONSTRAINT fk_tuner_marker_model_id_model FOREIGN KEY(model_id) REFERENCES model (id), 
	CONSTRAINT fk_tuner_marker_rollout_id_rollout FOREIGN KEY(rollout_id) REFERENCES rollout (id), 
	CONSTRAINT uq_tuner_marker_hardware_id_model_id UNIQUE (hardware_id, model_id)
);
CREATE TABLE tuner_run (
	id INTEGER NOT NULL, 
	started_at DOUBLE NOT NULL, 
	alive_at DOUBLE NOT NULL, 
	ended BOOLEAN NOT NULL, 
	CONSTRAINT pk_tuner_run PRIMARY KEY (id)
);
INSERT INTO "tuner_run" VALUES(1,2.0,2.0,0);
CREATE TABLE workload (
	id INTEGER NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	name VARCHAR NOT NULL, 
	requests JSON NOT NULL, 
	CONSTRAINT pk_workload PRIMARY KEY (id), 
	CONSTRAINT uq_workload_sha256 UNIQUE (sha256)
);
INSERT INTO "workload" VALUES(1,'98bc2a2a390d5104c8e4ba564970331c8553846c6f4669e40130950e872effbc','chat','[[0.0, 8, 4]]');
CREATE INDEX ix_decision_made_at ON decision (made_at);
CREATE INDEX ix_profile_hardware_id ON profile (hardware_id, model_id);
CREATE INDEX ix_rollup_period_s ON rollup (period_s, started_at);
CREATE INDEX ix_study_hardware_id ON study (hardware_id, model_id);
CREATE INDEX ix_acceptance_hardware_id ON acceptance (hardware_id, model_id);
CREATE INDEX ix_rollout_hardware_id ON rollout (hardware_id, model_id);
CREATE INDEX ix_last_known_good_hardware_id ON last_known_good (hardware_id, model_id);
COMMIT;
